"""What everything stands on: vectors with names, batched gradients, random streams, messages."""
