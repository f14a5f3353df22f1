"""Questions with known answers: data sets, runs over them, scores."""
