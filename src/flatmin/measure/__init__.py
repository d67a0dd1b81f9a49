"""What training did to the loss surface. Knows no optimizer."""
