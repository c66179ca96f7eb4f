"""How good a checkpoint is: measures, scores with their errors, and the page that shows them."""
