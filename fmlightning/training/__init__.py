"""Where the mathematics meets the Trainer."""
