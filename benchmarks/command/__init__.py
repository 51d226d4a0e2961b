"""What the commands share: options, where they write, tables on a terminal."""
