"""Makes the literal `serve run deployments` work: Ray imports a name without a colon less its last letter."""

from deployments import app as deployments

__all__ = ["deployments"]
