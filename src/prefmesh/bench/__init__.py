"""What the machine does with an experiment's rounds: its speed, its share of the peak, and others' on the same work."""
