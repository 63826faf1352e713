"""What a machine will do with a model, before the model is there: see `forecast.py`."""
