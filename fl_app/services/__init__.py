"""What watches a run and writes down what it sees. Services read the model; they never change it."""
