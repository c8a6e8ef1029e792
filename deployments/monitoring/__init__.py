"""What is measured of a running system: declared metrics, who records them, and how right the router is."""
