"""A server that speaks the LMMs-Eval protocol, on the same queue as the watches."""
