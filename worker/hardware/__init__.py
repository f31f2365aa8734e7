"""Which GPU or cores a child may use, their memory, and what their errors mean."""
