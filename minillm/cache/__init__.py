"""Where keys and values live: one contiguous piece per sequence, or blocks that sequences share."""
