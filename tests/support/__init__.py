"""What several test files share: tiny models, checkpoints, data, donors, and runs in processes of their own."""
