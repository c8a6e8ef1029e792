"""A base replica: its engine in a thread of its own, the adapters it holds, and how requests choose one."""
