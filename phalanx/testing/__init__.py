"""Tools for tests of Phalanx and of what is built on it; the services never import them."""
