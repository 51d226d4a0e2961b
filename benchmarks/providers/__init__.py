"""Who is compared: ours, and how others write the same."""
