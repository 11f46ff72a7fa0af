"""What every server of ours has: an address, a token where others can reach it, and bounds for its connections."""
