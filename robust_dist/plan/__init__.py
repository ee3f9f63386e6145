"""The memory and network traffic of a training job under each engine, and the engine to take."""
