"""What several tests share: tiny models and data, servers on loopback, and scripts that tests start."""
