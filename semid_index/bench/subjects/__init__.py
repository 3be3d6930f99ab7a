"""The subjects that come with the benchmark, one module for each library; each offers its own by the plugin hook."""
