"""Compare the splitting with cvxpy's CLARABEL and SCS on the same convex programs."""
