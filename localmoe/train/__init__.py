"""Train time: corpus → documents → embeddings → clusters → experts → bank."""
