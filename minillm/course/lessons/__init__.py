"""What a single lesson computes and nothing else needs."""
