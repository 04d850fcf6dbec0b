"""What a bundle carries to a board: it is copied there, and is never imported on this side but by tests."""
