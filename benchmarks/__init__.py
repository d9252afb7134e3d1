"""`make bench`: this library beside other servers, on one machine in one run."""
