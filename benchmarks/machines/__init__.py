"""What machines can do: peaks, floors, predictions beside measurements, launch configurations."""
