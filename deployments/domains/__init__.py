"""Changing domains while they are served: the publisher, what it can do, and what it is sent."""
