"""What a training job needs of memory and network under each engine, and which one to take."""
