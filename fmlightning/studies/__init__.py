"""What compares runs: evaluate, sweep, report."""
