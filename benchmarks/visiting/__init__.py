"""One command for a short visit to a GPU machine: its tasks, their time, and what came of them."""
