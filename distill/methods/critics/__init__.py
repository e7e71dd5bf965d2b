"""What DMD keeps beside the student: the discriminator of its GAN term, and how often the fake score is updated."""
