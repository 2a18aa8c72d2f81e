"""Jobs: the scheduler, the job script, the site profile, and scaling studies."""
