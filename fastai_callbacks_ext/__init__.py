"The callbacks that fastai lacks, and better versions of those it has"
__version__ = "0.1.0"
