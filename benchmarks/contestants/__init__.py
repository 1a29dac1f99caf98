"""What runs in a contestant's process: ours and the peers on the same documents. Modules named after a peer run in its environment."""
