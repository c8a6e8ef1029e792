"""The whole way, as a user goes it: train the starter, measure it, serve it, ask it."""
