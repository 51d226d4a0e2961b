"""One command for a short visit to a GPU machine: its steps, their time, and what came of them."""
