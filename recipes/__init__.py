"""Training scripts, the data they read and the networks they train; one file per experiment."""
