"""`grappa report`: the results of a finished run as one folder of plain files, to read and to share."""
