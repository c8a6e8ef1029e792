"""Serving: each deployment on its own, all of them in one process, and the whole on a real Ray cluster."""
