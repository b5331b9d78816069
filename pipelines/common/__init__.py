"""What every room needs: errors, settings, seeding, cores, fonts, files."""
