"""What `python -m equiseg_fast.evaluate` leaves behind: its record, its tables and its picture."""
