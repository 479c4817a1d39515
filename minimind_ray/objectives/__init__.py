"""What training minimises: the loss of each stage, as a sum and a count."""
