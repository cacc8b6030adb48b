"""The backends: each turns a Plan and its Operands into (out, lse), and none imports another."""
