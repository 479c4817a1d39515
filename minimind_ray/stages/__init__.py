"""The training stages, the code that prepares and runs them on any host, and trained models ready for use.

A stage is a record in config/stages.py and an object STAGE in `<name>.py` here (see stage.py). run.py prepares a
stage's data and runs it, start.py makes the model it starts from, and use.py opens a trained model.
"""
