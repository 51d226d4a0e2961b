"""What declarations of cases are made of: inputs, problems, costs."""
