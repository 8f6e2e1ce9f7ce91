"""What prepare_data.py, model.py, train.py and sample.py share; a file a job."""
