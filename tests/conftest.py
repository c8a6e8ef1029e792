"""What every test may use: the environment Ray needs, a nano root, and the one shared cluster."""

import os

# Before anything imports Ray: local clusters ask for a token otherwise, and report their use.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
