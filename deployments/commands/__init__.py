"""What `zephyra` prints and asks on a terminal."""
