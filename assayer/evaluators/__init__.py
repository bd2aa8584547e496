"""Built-in evaluators: each module here is one, chosen by its name (``--evaluator lm_eval``)."""
