"""`grappa report`: what a finished run found out, as one folder of plain files to read and to share."""
