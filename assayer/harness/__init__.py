"""What the evaluator ``lm_eval`` is made of: lm-eval's tasks, requests and models, with answers that survive a kill."""
