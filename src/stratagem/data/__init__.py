"""Real images: reading (`images`), storing (`shards`), and where they come from (`datasets`)."""
