"""`lory eval`: base and adapters on held-out rows, through the server that will serve them."""
